"""The stages: each is one command, `python -m rsi_jobs.stages.<name> --run URI --round N ...`."""
