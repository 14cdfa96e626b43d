"""A stage 1 run: flags, plan, engines, checkpoints, log. Imports all below; knows no evaluation."""
