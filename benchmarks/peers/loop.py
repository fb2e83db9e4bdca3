"""The floor: FedAvg as a bare loop in torch, without anything that a federation needs."""

import torch
from job import ROUNDS, SITES, make_model, make_volumes, report, train_step

model = make_model()
volumes = [tuple(map(torch.from_numpy, make_volumes(site))) for site in range(SITES)]
for _ in range(ROUNDS):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in before.items()}
    for image, label in volumes:
        model.load_state_dict(before)
        train_step(model, image, label)
        for name, parameter in model.named_parameters():
            total[name] += parameter.detach() - before[name]
    model.load_state_dict({name: before[name] + total[name] / SITES for name in before})
report(model)
