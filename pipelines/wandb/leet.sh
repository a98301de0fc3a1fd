#!/bin/sh
# The picture docs/leet.png: W&B's viewer in the terminal, on runs that were tracked offline.
#
#   pipelines/wandb/leet.sh FOLDER_OF_RUNS PICTURE.png      # such as outputs/stage2/sweep-…
#
# Needs tmux and chromium, and the python of an environment that has this project ($PYTHON).
set -eu
runs=$(cd "$1" && pwd) picture=$2 python=${PYTHON:-python}
wandb=$(dirname "$(command -v "$python")")/wandb
place=$(mktemp -d)/adapter-fusion
trap 'tmux -L leet-picture kill-server 2>/dev/null || true; rm -rf "$(dirname "$place")"' EXIT
mkdir -p "$place/wandb"
find "$runs" -type d -name 'offline-run-*' -exec ln -s {} "$place/wandb/" \;
keys() { tmux -L leet-picture send-keys "$@"; sleep 1; }
tmux -L leet-picture -f /dev/null new-session -d -x 150 -y 38 -c "$place" \
  "env TERM=xterm-256color COLORTERM=truecolor WANDB_CONFIG_DIR=$place/config WANDB_CACHE_DIR=$place/cache $wandb leet wandb"
sleep 8
keys Down; keys Space # the second run beside the first
keys /; keys -l 'validation/acc|train/(loss|grad|lr)|entropy/[035]|distance/[05]'; keys Enter
keys Tab; keys Tab; keys n; keys n # past the words of the command
sleep 2
tmux -L leet-picture capture-pane -p -e >"$place/screen"
"$python" - "$place/screen" "$place/screen.svg" <<'PYTHON'
import io
import sys

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

with open(sys.argv[1], encoding="utf-8") as file:
    screen = "\n".join(file.read().splitlines()[:-1])  # without the line of keys
console = Console(record=True, width=150, file=io.StringIO(), force_terminal=True, color_system="truecolor")
console.print(Text.from_ansi(screen), no_wrap=True, crop=False)
console.save_svg(sys.argv[2], title="wandb leet", theme=MONOKAI)
PYTHON
timeout 60 chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=0.75 \
  --window-size=1860,985 --screenshot="$picture" "file://$place/screen.svg" 2>/dev/null
