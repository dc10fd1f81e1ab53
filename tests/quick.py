"""Settings under which a whole run takes about a second: of the built-in job, on text, and of Fed-Grow."""

QUICK_JOB = (
    "rounds=2",
    "data.max_train=120",
    "data.max_test=60",
    "participants.count=3",
    "model.name=convnet",
    "run.workers=1",
)

QUICK_SETTINGS = (*QUICK_JOB, "method.start=fresh")
"""With windows of slices, which so short a run would not have."""

QUICK_TEXT = (
    "rounds=2",
    "data.source=python-docs",
    "data.partition=iid",
    "data.max_train=40",
    "data.max_test=16",
    "data.length=12",
    "participants.count=3",
    "run.workers=1",
)

QUICK_GROW = (
    *QUICK_TEXT,
    "model.name=decoder_lm",
    "model.options={features=16, heads=2, layers=2}",
    "method.name=fedgrow",
    "grow.small=[{features=8, layers=1}, {features=12, layers=2}]",
    "grow.intermediate={features=12, layers=2}",
    "grow.fit={steps=3}",
    "grow.pretraining={optimizer='adamw', learning_rate=0.01}",
    "training.batch_size=8",
    "training.local_epochs=1",
)
