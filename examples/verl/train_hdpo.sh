#!/usr/bin/env bash
# HDPO on verl (0.9): the paper's run, Qwen3-VL-8B after its cold start, on one node with 8 GPUs.
#
#   pip install langgraph-metis verl                   # into the environment that verl runs in
#   MODEL=runs/cold-start TRAIN=train.parquet VAL=val.parquet TOOLS=tools.yaml bash train_hdpo.sh
#
# Rows as verl has them: prompt, reward_model.ground_truth, and in extra_info what the reward reads: question, and
# verifier ("exact", "numeric", "choice", "math", "judge") where it is not that of the whole file. TOOLS is a tool
# configuration of verl's. A row that can't be judged, or whose tool server failed, is left out of its group.
set -euo pipefail

# One update for each batch of rollouts (ppo_mini_batch_size = train_batch_size): then verl's single clip on the sum of
# the channels has the same gradient as HDPO's two.
python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=hdpo \
    +algorithm.hdpo.w_tool=0.15 \
    algorithm.use_kl_in_reward=False \
    reward.custom_reward_function.path=pkg://metis_agent.engines.verl \
    reward.custom_reward_function.name=compute_score \
    +reward.custom_reward_function.reward_kwargs.verifier=exact \
    reward.reward_manager.name=naive \
    data.train_files="$TRAIN" \
    data.val_files="$VAL" \
    data.train_batch_size=128 \
    data.max_prompt_length=24576 \
    data.max_response_length=16384 \
    data.return_raw_chat=True \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40960 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.multi_turn.enable=True \
    actor_rollout_ref.rollout.multi_turn.format=hermes \
    actor_rollout_ref.rollout.multi_turn.max_assistant_turns=10 \
    actor_rollout_ref.rollout.multi_turn.max_tool_response_length=8192 \
    actor_rollout_ref.rollout.multi_turn.tool_config_path="$TOOLS" \
    actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.total_training_steps=200 \
    trainer.project_name=hdpo \
    trainer.experiment_name=metis \
    "$@"
