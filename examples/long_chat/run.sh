#!/bin/sh
# The recipe from the first step to the last, in the root of a clone. Everything it makes is in long-chat/.
set -eu
python examples/long_chat/make_data.py --output long-chat/data
jsparse finetune --config examples/long_chat/extend.yaml
jsparse finetune --config examples/long_chat/chat.yaml
python examples/long_chat/measure.py --folder long-chat
jsparse chat --model long-chat/assistant --budget 512 --messages long-chat/data/shown.json <long-chat/data/asked.txt
