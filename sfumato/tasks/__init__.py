"""What people do with a model: one typed function per task."""
