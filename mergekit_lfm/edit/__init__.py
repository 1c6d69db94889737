"""Edit facts in saved models: turn requests and a model into a patch file, which the engine applies."""
