"""What lies in output_dir: checkpoints, the record of a run, its log, its card; and going on from there."""
