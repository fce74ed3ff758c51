"""The router: OpenAI-format HTTP in front of Triton. Knows neither torch nor transformers."""
