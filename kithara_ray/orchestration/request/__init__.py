"""What a user asked of a run: a frozen value, the checks of the Trainer's arguments that make it, facts of it."""
