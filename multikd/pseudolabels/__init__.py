"""Labels from an ensemble of teachers, written into shards."""
