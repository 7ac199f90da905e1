"""What of a model trains, and in which form: groups, adapters, experts of a task, fewer bits, averages."""
