"""The child: everything that user code touches."""
