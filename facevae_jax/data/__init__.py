"""From image files to batches: layouts, preparation, drawn faces, pixel store, batches."""
