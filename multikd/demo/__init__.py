"""The embedded default: small real shards, three real teachers, a report. No loop of its own."""
