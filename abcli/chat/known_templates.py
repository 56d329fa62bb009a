"""Chat templates by name, for models that carry none.

The text is what llama.cpp writes for the template of the same name (llama2: "llama2-sys-bos", mistral:
"mistral-v3", alpaca: none), with these differences: the model's own end-of-sequence token stands where llama.cpp
has a fixed "</s>" or "<|endoftext|>", and contents are trimmed of all of Unicode's white space, not only ASCII's.
"""

from __future__ import annotations

_CHATML = """
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# The first beginning-of-sequence token is left to the tokenizer, which knows whether the model wants one.
_LLAMA2 = """
{%- set turn = namespace(first=true, open=false) -%}
{%- for message in messages -%}
{%- if not turn.open -%}{{ ('' if turn.first else bos_token) + '[INST] ' }}{%- endif -%}
{%- set turn.first = false -%}
{%- set turn.open = message['role'] != 'assistant' -%}
{%- if message['role'] == 'system' -%}
{{ '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ message['content'] + ' [/INST]' }}
{%- else -%}
{{ message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

_LLAMA3 = """
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""

# Gemma knows no system role: the system prompt goes before the next message of the user.
_GEMMA = """
{%- set waiting = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set waiting.system = waiting.system + message['content'] | trim -%}
{%- else -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}
{%- if waiting.system and message['role'] == 'user' -%}
{{ waiting.system + '\\n\\n' }}
{%- set waiting.system = '' -%}
{%- endif -%}
{{ message['content'] | trim + '<end_of_turn>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

_MISTRAL = """
{%- set turn = namespace(open=false) -%}
{%- for message in messages -%}
{%- if not turn.open -%}{{ '[INST] ' }}{%- endif -%}
{%- set turn.open = message['role'] != 'assistant' -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ message['content'] + '[/INST]' }}
{%- else -%}
{{ ' ' + message['content'] | trim + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

_ZEPHYR = """
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""

_PHI3 = """
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""

_VICUNA = """
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ 'USER: ' + message['content'] + '\\n' }}
{%- else -%}
{{ 'ASSISTANT: ' + message['content'] + eos_token + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

_ALPACA = """
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else -%}
{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""

KNOWN_TEMPLATES: dict[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "gemma": _GEMMA,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "phi3": _PHI3,
    "vicuna": _VICUNA,
    "zephyr": _ZEPHYR,
}
