"""The tasks for which models are loaded. No torch, so that --help can name them."""

# With what such a model is called in messages.
TASKS = {"lm": "causal language model", "classification": "classifier", "embedding": "encoder"}
PEFT_TASKS = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}  # PEFT's names
