"""Settings under which a whole run of the built-in job takes about a second."""

QUICK_SETTINGS = (
    "rounds=2",
    "data.max_train=120",
    "data.max_test=60",
    "participants.count=3",
    "model.name=convnet",
    "run.workers=1",
)
