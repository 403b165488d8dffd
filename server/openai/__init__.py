"""OpenAI's chat and completions: from a request's JSON to tokens, and from tokens to text, JSON, events."""
