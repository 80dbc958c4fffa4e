"""Readers of what people have on disk, one module a layout, each making a draft of a dataset."""
