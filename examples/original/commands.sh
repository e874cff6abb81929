#!/usr/bin/env bash
# The seventeen commands of the published code, in its order and in our words.
#
#   bash examples/original/commands.sh            all of them: Llama-3-8B-Instruct, a GPU with 80 GB, an API key, days
#   bash examples/original/commands.sh 3 4 5      some of them; each continues where it was interrupted
#
# Before them: matryoshka data gsm8k; matryoshka data gsm-hard; matryoshka data alfworld; matryoshka data lamp --task 1 (2N, 2M,
# 3, 4); and ROWS, the warm-up's rows of {prompt, response}. Whatever stands below as NAME=${NAME:-VALUE} can be set from outside.
# What differs from the published commands is in examples/original/README.md.
set -euo pipefail

OUT=${OUT:-runs/original}
CONTROLLER=${CONTROLLER:-models/Meta-Llama-3-8B-Instruct}
ENGINE=${ENGINE:-vllm}
PORT=${PORT:-8000}
GSM=${GSM:-configs/gsm8k_llama3.toml}
HOUSEHOLDS=${HOUSEHOLDS:-configs/alfworld_llama3.toml}
LAMP=${LAMP:-configs/lamp_llama3.toml}
ROWS=${ROWS:-data/gsm8k/pal_sft/train.jsonl}
GSM8K_TEST=${GSM8K_TEST:-data/gsm8k/test.jsonl}
GSM_HARD=${GSM_HARD:-data/gsm8k/gsmhardv2.jsonl}
LAMP_DATA=${LAMP_DATA-data/lamp}     # empty: made-up users
LAMP_TASKS=${LAMP_TASKS:-1 2N 2M 3 4}
OTHER=${OTHER:---generator.model gpt-4o-mini}     # the second generator
HARDWARE=${HARDWARE:---dtype bfloat16 --device cuda}

LORA="--lora.rank 8 --lora.alpha 16 --lora.dropout 0.05"
DPO="--objective.beta 0.1 --objective.label-smoothing 0.1 --train.epochs 1"
OPEN_LOOP="--collect.inner-attempts 1 --collect.outer-turns 1 --collect.protocol label_free"
CLOSED_LOOP="--evaluate.inner-attempts 6 --evaluate.outer-turns 1 --evaluate.protocol oracle"

# 1. The warm-up: SFT on the 216 rows (train_sft).
step_1() {
  matryoshka sft --data "$ROWS" --model "$CONTROLLER" --out "$OUT/gsm-warmup" $HARDWARE $LORA \
    --train.learning-rate 2e-5 --train.epochs 3 --train.batch-size 64
}

# 2. The controller behind HTTP (vllm.sh, vllm_peft.sh). The steps below sample it in their own process and need no server.
step_2() {
  matryoshka serve --model "$CONTROLLER" --engine "$ENGINE" --adapter "lora=$OUT/gsm-warmup/adapter" --port "$PORT" &
  local server=$!
  until (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; do kill -0 $server || return 1; sleep 1; done
  kill $server && wait $server
}

# 3. Ten plans for each training problem, one attempt each (gsm_generate_data.py).
step_3() {
  matryoshka collect --config "$GSM" --controller.path "$CONTROLLER" --controller.adapter "$OUT/gsm-warmup/adapter" \
    --out "$OUT/gsm-episodes" $OPEN_LOOP
}

# 4. Their pairs, at most five a problem (the end of gsm_generate_data.py).
step_4() {
  matryoshka pairs --in "$OUT/gsm-episodes" --out "$OUT/gsm-pairs.jsonl" --cap 5
}

# 5. DPO on them, from the warm-up's adapter, which is the reference, too (train_dpo).
step_5() {
  matryoshka dpo --data "$OUT/gsm-pairs.jsonl" --model "$CONTROLLER" --adapter "$OUT/gsm-warmup/adapter" --out "$OUT/gsm-dpo" \
    $HARDWARE $DPO --train.learning-rate 5e-6 --train.batch-size 64
}

# 6 to 9. Six attempts that see whether the answer was right, on two sets with two generators (gsm_pipeline.py --closeloop
# --compare_answer). Without $CLOSED_LOOP, retries see errors alone: the default here.
gsm() {
  matryoshka evaluate --config "$GSM" --controller.path "$CONTROLLER" --policy "$OUT/gsm-dpo/adapter" --split test \
    $CLOSED_LOOP --task.options.test-file "$1" --out "$OUT/$2" "${@:3}"
}
step_6() { gsm "$GSM8K_TEST" gsm8k; }
step_7() { gsm "$GSM_HARD" gsm-hard; }
step_8() { gsm "$GSM8K_TEST" gsm8k-other $OTHER; }
step_9() { gsm "$GSM_HARD" gsm-hard-other $OTHER; }

# 10. Plans for households, one attempt each (alfworld_generate_data.py --disable_closeloop).
step_10() {
  matryoshka collect --config "$HOUSEHOLDS" --controller.path "$CONTROLLER" --out "$OUT/households-episodes" $OPEN_LOOP
}

# 11. Their pairs.
step_11() {
  matryoshka pairs --in "$OUT/households-episodes" --out "$OUT/households-pairs.jsonl"
}

# 12. DPO on them (train_dpo).
step_12() {
  matryoshka dpo --data "$OUT/households-pairs.jsonl" --model "$CONTROLLER" --out "$OUT/households-dpo" $HARDWARE $LORA $DPO \
    --train.learning-rate 5e-6 --train.batch-size 64
}

# 13. Six attempts on the unseen games (alfworld_pipeline.py).
step_13() {
  matryoshka evaluate --config "$HOUSEHOLDS" --controller.path "$CONTROLLER" --policy "$OUT/households-dpo/adapter" \
    --split test $CLOSED_LOOP --out "$OUT/households"
}

# 14 to 17: LaMP, for each of its tasks.
lamp_files() {
  printf -- "--task.options.task %s" "$1"
  [ -z "$LAMP_DATA" ] || printf -- " --task.options.%s" \
    "train-file $LAMP_DATA/LaMP_$1/train_questions.json" "test-file $LAMP_DATA/LaMP_$1/dev_questions.json"
}

# 14. Ten summaries for each user (lamp_generate_data.py).
step_14() {
  for task in $LAMP_TASKS; do
    matryoshka collect --config "$LAMP" --controller.path "$CONTROLLER" $(lamp_files "$task") --out "$OUT/lamp-$task-episodes"
  done
}

# 15. Their pairs by the task's own score (post_select.py, post_process.py), and DPO on them (train_dpo).
step_15() {
  for task in $LAMP_TASKS; do
    matryoshka pairs --in "$OUT/lamp-$task-episodes" --out "$OUT/lamp-$task-pairs.jsonl" --cap 2
    matryoshka dpo --data "$OUT/lamp-$task-pairs.jsonl" --model "$CONTROLLER" --out "$OUT/lamp-$task-dpo" $HARDWARE $LORA $DPO \
      --train.learning-rate 1e-5 --train.batch-size 64
  done
}

# 16. One summary and one answer for each test user (lamp_pipeline.py).
step_16() {
  for task in $LAMP_TASKS; do
    matryoshka evaluate --config "$LAMP" --controller.path "$CONTROLLER" --policy "$OUT/lamp-$task-dpo/adapter" --split test \
      $(lamp_files "$task") --out "$OUT/lamp-$task"
  done
}

# 17. The metrics of a file of predictions (eval.py).
step_17() {
  for task in $LAMP_TASKS; do
    matryoshka score "$OUT/lamp-$task/trajectories.jsonl" --task.name lamp $(lamp_files "$task") --seed "${SEED:-42}"
  done
}

for step in "${@:-$(seq 1 17)}"; do
  for number in $step; do
    echo "== $number" >&2
    "step_$number"
  done
done
