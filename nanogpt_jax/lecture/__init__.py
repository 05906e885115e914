"""The models of "Let's build GPT", and the climb that trains them one after another."""
