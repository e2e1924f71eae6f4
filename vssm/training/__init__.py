"""What trainers of classifiers and of segmenters share: options, checkpoints, records, diagnosis, interruption."""
