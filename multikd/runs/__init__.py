"""Runs that a command makes of configs: settings put into them, their folders, their scores."""
