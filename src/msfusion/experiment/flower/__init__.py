"""A run as a Flower app: the configuration lies in it, for the server and all participants.

deploy        writes the app
server        what its ServerApp does
client        what its ClientApp does; it is started for each message, so it imports little
resident      a participant's process that stays from one message to the next
participant   what a participant is, and has on its machine
"""
