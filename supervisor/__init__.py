"""The parent: starts, watches, stops and replaces the workers. It never imports user code."""
