#!/bin/sh
# Prints the Secrets of this overlay, with new passwords: ./secrets.sh | kubectl apply -f -
# Run it once: the server keeps the passwords that it was created with.
set -eu

password() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

postgres=$(password)
shop=$(password)
cdc=$(password)

cat <<YAML
apiVersion: v1
kind: Namespace
metadata:
  name: pgconductor-dev
---
apiVersion: v1
kind: Secret
metadata:
  name: postgres
  namespace: pgconductor-dev
stringData:
  postgres_password: $postgres
  shop_password: $shop
  cdc_password: $cdc
---
apiVersion: v1
kind: Secret
metadata:
  name: conductor-database
  namespace: pgconductor-dev
stringData:
  conductor_dsn: postgresql://shop:$shop@postgres:5432/shop
---
apiVersion: v1
kind: Secret
metadata:
  name: cdc-database
  namespace: pgconductor-dev
stringData:
  cdc_source_dsn: postgresql://cdc:$cdc@postgres:5432/shop
YAML
