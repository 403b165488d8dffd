"""OpenAI's chat and completions: from a request's JSON to tokens, and from tokens back to text, JSON and events."""
