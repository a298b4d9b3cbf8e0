"""Pretrained pipelines: loading, networks, captions and the settings that come with a model."""
