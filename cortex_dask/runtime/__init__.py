"""The running of a job: coordinator, split task, supervisor, handler process."""
