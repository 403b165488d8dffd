"""One adapter on one module: kinds of modules, which of a model's are adapted, layers to train, surgery."""
