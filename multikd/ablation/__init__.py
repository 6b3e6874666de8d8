"""Which teachers are worth paying for: studies over teachers, seeds and settings."""
