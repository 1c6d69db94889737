"""Chat templates that a recipe names: formats of model families, written from their public descriptions.

A template is Jinja, as transformers renders it: `messages` with a role and a content each, `add_generation_prompt`, and
the tokenizer's `bos_token` and `eos_token`.
"""

from __future__ import annotations

from mergekit_lfm.errors import Refusal, did_you_mean

AUTO = "auto"

# Source: https://github.com/tatsu-lab/stanford_alpaca, the prompt without an input
_ALPACA = """\
{%- set intro = 'Below is an instruction that describes a task. \
Write a response that appropriately completes the request.' -%}
{%- for message in messages -%}
{%- if loop.first -%}
{{- (message['content'] if message['role'] == 'system' else intro) + '\\n\\n' -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Response:\\n' -}}
{%- endif -%}"""

# Source: https://github.com/openai/openai-python, chatml.md of release 0.28
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""

# Source: https://huggingface.co/LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct, the prompt of its card
_EXAONE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '[|' + message['role'] + '|]' + message['content'] -}}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '[|assistant|]' -}}
{%- endif -%}"""

# Source: https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""

# Source: https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2, the instruction format of its card; the system's
# text stands before that of the first user, as https://docs.mistral.ai/guides/prompting_capabilities advises
_MISTRAL = """\
{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set state.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + state.system + message['content'] + ' [/INST]' -}}
{%- set state.system = '' -%}
{%- else -%}
{{- ' ' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}"""

TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}


def read_chat_template(value: object) -> object:
    """The recipe's `chat_template`: auto, a name of TEMPLATES, or Jinja. Raises Refusal for anything else."""
    known = (AUTO, *TEMPLATES)
    if value is None or value in known or (isinstance(value, str) and ("{{" in value or "{%" in value)):
        return value
    raise Refusal(
        "found {found}, expected {expected}; {cure}",
        found=f"{value!r:.80}",
        expected="auto, a template's name, or a template in Jinja",
        cure=did_you_mean(value, known),
    )
