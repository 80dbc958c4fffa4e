"""What a run leaves behind: metrics.jsonl (the record), Weights & Biases (its mirror) and lines on the console."""
