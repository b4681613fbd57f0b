"""What is particular to diffusion language models: the facts of a model, masks, samplers, likelihood, tasks."""
