"""pfl-research 0.6: its FederatedAveraging on its SimulatedBackend, in one process."""

import torch
from job import LEARNING_RATE, ROUNDS, SITES, loss_of, make_model, make_volumes, report
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel

network = make_model()


def loss(image, label, **_):
    network.train()
    return loss_of(network, image, label)


def metrics(image, label, **_):
    with torch.no_grad():
        return {"loss": Weighted(4 * float(loss_of(network, image, label)), 4)}


network.loss, network.metrics = loss, metrics
model = PyTorchModel(
    network,
    local_optimizer_create=torch.optim.SGD,
    central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
)
volumes = {site: [torch.from_numpy(array) for array in make_volumes(site)] for site in range(SITES)}
users = FederatedDataset.from_slices(volumes, get_user_sampler("minimize_reuse", list(volumes)))
FederatedAveraging().run(
    backend=SimulatedBackend(training_data=users, val_data=users),
    model=model,
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=ROUNDS,
        evaluation_frequency=ROUNDS + 1,
        train_cohort_size=SITES,
        val_cohort_size=None,
    ),
    model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=None),
    model_eval_params=NNEvalHyperParams(local_batch_size=None),
)
report(network)
