"""What a recipe's schedule costs, known before anything is trained."""

from sparsetwin.methods import Method
from sparsetwin.metrics import count_forward_flops
from sparsetwin.recipes import Recipe, check_layers, example_input, meta_model
from sparsetwin.schedules import Phase, Schedule
from sparsetwin.training import finetuning_step
from sparsetwin.training.costs import Density, step_flops


def density_costs(schedule: Schedule) -> dict[str, float]:
    """Return the costs of a schedule over those of a dense run, as if all FLOPs were those of target weights."""
    total = schedule.total_steps
    density = sum(phase.steps * (1 - phase.sparsity) for phase in schedule.phases) / total
    return {"training_flops_over_dense": density, "inference_flops_over_dense": 1 - schedule.final_sparsity}


def recipe_costs(method: Method, recipe: Recipe) -> dict[str, float]:
    """Return the costs of a recipe at the same sparsity in every target layer, as the paper's uniform runs have it.

    Args:
        method: Of the recipe, with a schedule in any unit.
        recipe: Its network, data, targets and fine-tuning.

    Raises:
        ConfigError: If the network or the shape of the data is known to a run only, or layers have sparsities that the
            schedule does not end with.
    """
    model = meta_model(recipe)
    check_layers(recipe, method, model)
    forward = count_forward_flops(model, example_input(recipe.dataset))
    targets = recipe.targets.build().resolve(model)

    def flops(sparsity: float) -> int:
        counts = {
            name: size - round(sparsity * size) if name in targets else size
            for name, size in forward.weight_sizes.items()
        }
        return forward.total(counts)

    def step(phase: Phase) -> int:
        updated = getattr(method, "backward_sparsity", phase.sparsity) if phase.is_sparse else 0.0
        density = Density(all=forward.total(), kept=flops(phase.sparsity), updated=flops(updated), fixed=flops(1.0))
        return step_flops(method, phase, density, enters=False)

    schedule = method.schedule
    dense = 3 * schedule.total_steps * forward.total()
    trained = sum(phase.steps * step(phase) for phase in schedule.phases)
    costs = {
        "training_flops_over_dense": trained / dense,
        "inference_flops_over_dense": flops(schedule.final_sparsity) / forward.total(),
        "dense_forward_flops": float(forward.total()),
        "target_weights": float(sum(weight.numel() for weight in targets.values())),
    }
    if recipe.train.dense_finetune:
        costs["dense_finetune_flops_over_dense"] = 1 - finetuning_step(method) / schedule.total_steps
    return costs
