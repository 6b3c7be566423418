"""The user's request for a run: a frozen value, the checks of the Trainer's arguments that make it, and its facts."""
