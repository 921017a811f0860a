"""TRL's words for the plan of a run."""

from trl import SFTConfig

from qtune.plan import Plan
from qtune.recipe.schema import Training
from qtune.run.folder import RunDir

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}
"""Our names -> transformers' (transformers.training_args.OptimizerNames)."""


def sft_config(
    training: Training, plan: Plan, run_dir: RunDir, *, has_validation: bool, evaluate_first: bool = False
) -> SFTConfig:
    """TRL's words for the plan. Every default of TRL or transformers that matters is spelled out here.

    evaluate_first: the checkpoint that training goes on from is still owed its evaluation.
    """
    every_epoch = training.checkpoint_every == "epoch"
    eval_every = training.eval_every if has_validation else "never"
    return SFTConfig(
        output_dir=str(run_dir.checkpoints),
        run_name=run_dir.name,
        # Time: the effective batch, and its end.
        per_device_train_batch_size=plan.micro_batch_size,
        per_device_eval_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.accumulation_steps,
        num_train_epochs=training.epochs,
        max_steps=training.steps or -1,
        # The optimization.
        optim=OPTIMIZERS[plan.optimizer],
        learning_rate=plan.learning_rate,
        # A share of the steps; `QloraTrainer.create_scheduler` reads it.
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_gradient_norm,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        average_tokens_across_devices=True,
        seed=training.seed,
        data_seed=training.seed,
        # The device.
        use_cpu=plan.device.kind == "cpu",
        bf16=plan.compute_dtype == "bfloat16",
        fp16=plan.loss_scaling,
        tf32=None,
        activation_checkpointing=bool(plan.gradient_checkpointing),  # `CheckpointedLayers` narrows it
        activation_checkpointing_kwargs={"use_reentrant": False} if plan.gradient_checkpointing else None,
        activation_offloading=False,
        use_liger_kernel=False,
        # Rows are tokenized, masked, cut and packed by qtune.data.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=False,
        completion_only_loss=False,
        assistant_only_loss=False,
        loss_type="nll",
        # The router of a mixture of experts is frozen, so balancing it would only add a term without a gradient.
        router_aux_loss_coef=0.0,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device.kind == "cuda",
        dataloader_drop_last=False,
        # What is said and kept.
        logging_strategy="steps",
        logging_steps=training.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(training.trackers) or "none",
        eval_strategy={"never": "no", "epoch": "epoch"}.get(str(eval_every), "steps"),
        eval_steps=eval_every if isinstance(eval_every, int) else None,
        eval_on_start=evaluate_first,
        prediction_loss_only=True,
        save_strategy="epoch" if every_epoch else "steps",
        save_steps=500 if every_epoch else training.checkpoint_every,
        # Old checkpoints are removed by `_save_checkpoint` below, after the new one is complete.
        save_total_limit=None,
        save_only_model=False,
        push_to_hub=False,
    )
