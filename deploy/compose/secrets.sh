#!/bin/sh
# Makes what compose.yaml hands to its services as secrets, into deploy/secrets. What is there stays.
# Others are kept out by the folder's mode; the files can be read by all, since each service is another user.
set -eu
cd "$(dirname "$0")/.."
mkdir -p secrets
chmod 0700 secrets

put() { # name, value
    [ -s "secrets/$1" ] || printf '%s' "$2" > "secrets/$1"
    chmod 0444 "secrets/$1"
}
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

[ -s secrets/openrouter_api_key ] || put openrouter_api_key "${OPENROUTER_API_KEY:?is not set: the key of OpenRouter}"
put xenios_pepper "$(random)"
put xenios_admin_key "sk-admin-$(random)"
put xenios_app_key "sk-app-$(random)"
put xenios_metrics_token "$(random)"
put grafana_password "$(random)"
put valkey_password "$(random)"
put postgres_password "$(random)"
put xenios_redis_url "redis://:$(cat secrets/valkey_password)@valkey:6379/0"
put xenios_database_url "postgresql://xenios:$(cat secrets/postgres_password)@postgres:5432/xenios"
