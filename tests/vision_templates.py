"""What the templates of vision-language models do with parts, in their own words and markers.

Tools and video are left out.
"""

LLAVA_TEMPLATE = """{%- for message in messages -%}
    {%- if message.role != 'system' -%}{{ message.role | upper + ': ' }}{%- endif -%}
    {%- for part in message.content | selectattr('type', 'equalto', 'image') -%}{{ '<image>\\n' }}{%- endfor -%}
    {%- for part in message.content | selectattr('type', 'equalto', 'text') -%}{{ part.text + ' ' }}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
GEMMA_TEMPLATE = """{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {%- if messages[0].content is string -%}
        {%- set first_user_prefix = messages[0].content + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0].content[0].text + '\\n\\n' -%}
    {%- endif -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}
    {%- if message.content is string -%}
        {{ message.content | trim }}
    {%- elif message.content is iterable -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{ '<image_soft_token>' }}
            {%- elif part.type == 'text' -%}
                {{ part.text | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Invalid content type') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
# Kosmos-2 brings none. It completes a text, and its own processor puts the picture before that.
KOSMOS_TEMPLATE = (
    "<grounding>{% for part in messages[-1].content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {
    "llava": LLAVA_TEMPLATE,
    "smolvlm": SMOLVLM_TEMPLATE,
    "qwen3_vl": QWEN_TEMPLATE,
    "gemma3n": GEMMA_TEMPLATE,
    "kosmos2": KOSMOS_TEMPLATE,
}
