"""The models of "Let's build GPT", and the ladder that trains them one after the other."""
