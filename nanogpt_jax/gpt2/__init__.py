"""OpenAI's GPT-2 weights in, and a run's weights out."""
