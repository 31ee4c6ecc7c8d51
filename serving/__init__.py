"""How a winner reaches users: registry, engine, application, rollout. Imports only ``cluster`` of ours."""
