"""The tasks for which models are loaded. No torch, so that --help can name them."""

# With what such a model is called in messages. Statistics of models are collected for these.
TASKS = {"lm": "causal language model", "classification": "classifier", "embedding": "encoder"}
# Models are tuned for these, and judged on them.
TUNE_TASKS = {
    **TASKS,
    "masked_lm": "masked language model",
    "seq2seq": "sequence-to-sequence model",
    "regression": "model with one output",
}
HEADED = ("classification", "regression")  # with a head on the trunk; in decoders it reads a row's last token
# PEFT's names; it has none for masked language models.
PEFT_TASKS = {
    "lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "embedding": "FEATURE_EXTRACTION",
    "masked_lm": None,
    "seq2seq": "SEQ_2_SEQ_LM",
    "regression": "SEQ_CLS",
}
