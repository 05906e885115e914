"""The page of `python sample.py --web`."""
