"""Any method over Flower: a ServerApp and a ClientApp that talk in Flower's own messages, one for each task.

    frames        what may be said
    records       frames, tasks and updates in Flower's records
    post          messages to nodes, and the replies to them
    nodes         which node is which participant
    engine        the engine: it hands out tasks and brings back updates
    participant   what a participant answers
    memory        what a participant keeps between its rounds, in the context that Flower keeps for it, or in files
    strategy      windows of one large model for a Flower app that there is already

Flower starts a new process for each message, and keeps of a participant what lies in its context.
"""
