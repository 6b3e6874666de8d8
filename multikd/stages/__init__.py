"""Chains of runs: each stage is an ordinary ``fit``, and builds on what earlier ones exported."""
