-- Shopify: one row per customer of the customers export, and one per e-mail address that only orders know.
--
-- Export: Admin > Customers > Export. Optional: without it, customers are those of the orders.
-- The key of a customer is the hash of the e-mail address, since the orders export has no customer id. A customer
-- without e-mail keeps the number of the customers export, which no order refers to. Customers of orders get the name
-- of the billing address. Shopify exports neither age nor date of registration.
--
-- source customers_export: customers*, shopify_customers*
-- columns customers_export: Customer ID, First Name, Last Name, Email, Default Address City, Total Orders
-- source orders: orders*, shopify_orders*
-- columns orders: Email, Billing Name, Billing City, Shipping City, Created at

WITH of_orders AS (
    SELECT * FROM (
        SELECT *,
            ROW_NUMBER() OVER (
                PARTITION BY lower(trim(Email))
                ORDER BY coalesce(trim(`Billing Name`), '') = '', `Created at` DESC, _delivery DESC, _source_row DESC
            ) AS recency
        FROM orders
        WHERE trim(Email) <> ''
    ) WHERE recency = 1
)
SELECT
    coalesce(
        CASE WHEN trim(Email) <> '' THEN CAST(xxhash64(lower(trim(Email))) AS STRING) END,
        regexp_replace(trim(`Customer ID`), "^'", '')
    ) AS customer_id,
    nullif(trim(`First Name`), '') AS first_name,
    nullif(trim(`Last Name`), '') AS last_name,
    nullif(trim(Email), '') AS email,
    nullif(trim(`Default Address City`), '') AS city,
    _delivery, _source_file, _source_row
FROM customers_export
UNION ALL
SELECT
    CAST(xxhash64(lower(trim(o.Email))) AS STRING) AS customer_id,
    nullif(regexp_extract(trim(o.`Billing Name`), '^([\\s\\S]*?)\\s*(\\S+)$', 1), '') AS first_name,
    nullif(regexp_extract(trim(o.`Billing Name`), '^([\\s\\S]*?)\\s*(\\S+)$', 2), '') AS last_name,
    trim(o.Email) AS email,
    coalesce(nullif(trim(o.`Billing City`), ''), nullif(trim(o.`Shipping City`), '')) AS city,
    o._delivery, o._source_file, o._source_row
FROM of_orders o
LEFT ANTI JOIN customers_export c ON lower(trim(c.Email)) = lower(trim(o.Email))
