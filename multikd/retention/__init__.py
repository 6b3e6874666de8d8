"""What a student retained: encoders by name, data sets, cached features, tasks, the matrix.

Importing this package imports nothing: ``multikd.retention.commands`` is what the command runs.
"""
