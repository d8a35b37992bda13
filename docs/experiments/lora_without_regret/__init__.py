"""Scripts of the experiment in ../lora-without-regret.md."""
