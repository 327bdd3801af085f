"""Templates in the styles that models ship, written for these tests, and conversations for them."""

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}"""

HEADERS = """{{- bos_token }}
{%- if tools is not none and tools %}{%- set date = strftime_now('%Y') %}{% endif %}
{%- set loop_messages = messages %}
{%- if loop_messages[0]['role'] == 'system' %}
    {%- set system = loop_messages[0]['content'] | trim %}
    {%- set loop_messages = loop_messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start|>system<|end|>\n\n' + system }}
{%- if tools is defined and tools %}
    {{- '\nTools:\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\n\n' }}
    {%- endfor %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|end|>{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- '}<|eot|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>ipython<|end|>' + (message.content | tojson) + '<|eot|>' }}
    {%- else %}
        {{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{%- endif %}
"""

ALTERNATING = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"""

TURNS = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

HERMES = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.seen and message.role == 'user' %}{%- set ns.seen = true %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\n' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
{{- ns.last }}"""

ODDITIES = """{#- a comment -#}
{%- macro shout(text) %}{{ text | upper }}!{% endmacro -%}
{%- for message in messages %}
{%- if loop.index > 3 %}{% break %}{% endif %}
{{ shout(message['content'].strip().split('x')[0]) }} & <b>"{{ message.name }}"</b> {{ message.missing }}
{{ dict(a=1, role=message.role).items() | list | tojson }} {{ {'b': 1, 'a': '\u00e9<'} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ '\u00e9' | tojson(true) }} {{ [1.5, none, true] | tojson }}
{% endfor %}
{{ eos_token }}  {{ pad_token is defined }} {{ documents is none }} {{ unk_token }}
"""

ALL = {
    "chatml": CHATML,
    "headers": HEADERS,
    "alternating": ALTERNATING,
    "turns": TURNS,
    "hermes": HERMES,
    "oddities": ODDITIES,
}

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Z\u00fcrich <&>", "days": 3, "wet": None}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather\'s "forecast" <html> & caf\u00e9',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

CONVERSATIONS = {
    "one turn": ([{"role": "user", "content": " What is the capital of France? "}], []),
    "three turns": (
        [
            {"role": "user", "content": "hi \u4f60\u597d <b>&amp;</b>"},
            {"role": "assistant", "content": "  hello\n"},
            {"role": "user", "content": "{{ bos_token }} {% raw %}"},
        ],
        [],
    ),
    "system": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}], []),
    "tools": (
        [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"sun": true}', "tool_call_id": "call_1", "name": "get_weather"},
            {"role": "user", "content": "thanks"},
        ],
        [TOOL, TOOL],
    ),
}
