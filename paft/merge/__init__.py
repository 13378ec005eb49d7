"""Deltas into a model or an adapter: `engine.merge` streams tensors through a method of `methods` and a `writer`."""
