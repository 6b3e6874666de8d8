"""Shards in, batches out: writing, indexing, reading, viewing and caching of images.

Importing this package imports nothing: take what you need from its files, such as
``multikd.data.sources.ShardSource`` or ``multikd.data.module.ShardDataModule``.
"""
